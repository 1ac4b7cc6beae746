"""Puts the report together: template, style, tables and figures in one HTML file."""

from __future__ import annotations

from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from omega_qvla.evaluation.diagnostics import ONCE
from omega_qvla.evaluation.report import plots, tables, traces
from omega_qvla.evaluation.report.data import DriftView, LayerView, PairedEpisode, ReportData
from omega_qvla.evaluation.report.heatmap import Panel, heatmap, legend
from omega_qvla.evaluation.report.names import LayerName, short_name, split_name
from omega_qvla.evaluation.report.theme import arm_colours
from omega_qvla.files import write_text


def write_report(data: ReportData, path: Path) -> Path:
    """Write the page, atomically. Returns `path`."""
    write_text(path, render_report(data))
    return path


def render_report(data: ReportData) -> str:
    """The whole page: one HTML document without a single outside reference."""
    assets = resources.files("omega_qvla.evaluation.report")
    template = Template((assets / "template.html").read_text(encoding="utf-8"))
    return template.substitute(
        style=(assets / "style.css").read_text(encoding="utf-8"),
        title=escape(data.title),
        tiles=tables.headline_tiles(data),
        headline=tables.headline_table(data),
        arms=tables.definitions(data.arms),
        success=plots.success_bars(data) or _absent("Success"),
        tasks=tables.task_table(data) or _absent("Success by task"),
        paired=tables.paired_table(data),
        cosine=plots.cosine_plot(data) or _absent("Drift"),
        drift=_drift(data),
        ranges=_layer_figures(data, "ranges"),
        channels=_layer_figures(data, "channels"),
        episodes=_episodes(data),
        environment=tables.definitions(data.environment),
        notes="".join(f"<li>{escape(note)}</li>" for note in data.notes),
        command=f"<pre><code>{escape(data.command)}</code></pre>" if data.command else "",
    )


def _absent(what: str) -> str:
    return f'<p class="absent">{what} was not measured in this run.</p>'


def _folds(sections: list[tuple[str, str]], what: str) -> str:
    """Titled parts that fold away, the first one open."""
    if not sections:
        return _absent(what)
    return "".join(
        f"<details{' open' if index == 0 else ''}><summary>{escape(title)}</summary>"
        f"{body}</details>"
        for index, (title, body) in enumerate(sections)
    )


def _drift(data: ReportData) -> str:
    groups: dict[tuple[str, str], list[DriftView]] = {}
    for view in data.layer_drift:
        groups.setdefault((view.family, view.variant), []).append(view)
    sections = []
    for index, ((family, variant), views) in enumerate(groups.items()):
        parts = [_once_heatmaps(views), _head_heatmap(views)]
        if any(step != ONCE for v in views for e in v.drift.accumulated.values() for step in e):
            parts += [
                "<h3>Accumulated over the trajectory</h3><p>The same layers against the "
                "full-precision run: the error they inherit plus their own, geometric mean "
                "over layers.</p>",
                plots.drift_by_step(data, views, f"steps{index}"),
            ]
        sections.append((data.group_name(family, variant), "".join(parts)))
    return _folds(sections, "Drift by layer")


def _head_heatmap(views: list[DriftView]) -> str:
    """Layers inside the denoising loop: a row per layer, a column per step."""
    names = _rows(views, in_loop=True)
    if not names:
        return ""
    row_of = {name: row for row, name in enumerate(names)}
    panels = [
        Panel(
            view.arm,
            {
                (row_of[name], step): value
                for name, errors in view.drift.local.items()
                for step, value in errors.items()
                if step != ONCE
            },
        )
        for view in views
    ]
    parsed = [split_name(name) for name in names]
    breaks = [i for i in range(1, len(names)) if parsed[i][:2] != parsed[i - 1][:2]]
    columns = [str(step + 1) for step in range(views[0].drift.num_steps)]
    body = heatmap(_row_labels(parsed), columns, panels, "drift by step", separators=breaks)
    return f"<h3>Action head: layer by denoising step</h3>{legend()}{body}"


def _once_heatmaps(views: list[DriftView]) -> str:
    """Layers that run once, tower by tower: a row per block, a column per kind of layer."""
    parsed = {name: split_name(name) for name in _rows(views, in_loop=False)}
    if not parsed:
        return ""
    towers = dict.fromkeys(layer.stack for layer in parsed.values())
    bodies = (
        _tower_heatmap(views, {n: layer for n, layer in parsed.items() if layer.stack == tower})
        for tower in towers
    )
    return f"<h3>Layers that run once per observation</h3>{legend()}{''.join(bodies)}"


def _tower_heatmap(views: list[DriftView], layers: dict[str, LayerName]) -> str:
    blocks = list(dict.fromkeys(layer.block for layer in layers.values()))
    kinds = list(dict.fromkeys(layer.kind for layer in layers.values()))
    panels = [
        Panel(
            view.arm,
            {
                (blocks.index(layer.block), kinds.index(layer.kind)): view.drift.local[name][ONCE]
                for name, layer in layers.items()
                if name in view.drift.local
            },
        )
        for view in views
    ]
    stack = next(iter(layers.values())).stack
    rows = [f"{stack} {block}" if block >= 0 else "" for block in blocks]
    return heatmap(rows, _kind_labels(kinds), panels, f"drift of {stack} layers that run once")


def _rows(views: list[DriftView], in_loop: bool) -> list[str]:
    """Layers of either kind in the order of the first arm that has them."""
    return list(
        dict.fromkeys(
            name
            for view in views
            for name, errors in view.drift.local.items()
            if (ONCE not in errors) == in_loop
        )
    )


def _row_labels(layers: list[LayerName]) -> list[str]:
    towers = {layer.stack for layer in layers}
    labels = []
    for previous, layer in zip([None, *layers], layers, strict=False):
        first = previous is None or previous[:2] != layer[:2]
        block = f"{layer.stack} {layer.block}" if len(towers) > 1 else f"block {layer.block}"
        labels.append(f"{block} · {layer.kind}" if first and layer.block >= 0 else layer.kind)
    return labels


def _kind_labels(kinds: list[str]) -> list[str]:
    """`self_attn.q_proj` -> `q`: what fits over a narrow column, more words where two agree."""
    words = [kind.removesuffix(".0").split(".") for kind in kinds]
    short = [word[-1].removesuffix("_proj").removeprefix("to_") or word[-1] for word in words]
    return [
        label if short.count(label) == 1 else ".".join([*word[-2:-1], label])
        for label, word in zip(short, words, strict=True)
    ]


def _layer_figures(data: ReportData, kind: str) -> str:
    sections = []
    for index, view in enumerate(data.layer_views):
        body = "".join(
            _layer_figure(view, position, kind, f"{kind}{index}-{position}")
            for position in range(len(view.layers))
        )
        if body:
            title = f"{data.group_name(view.family, view.variant)}: {view.arm}"
            sections.append((title, body))
    return _folds(sections, "The input of the layers")


def _layer_figure(view: LayerView, position: int, kind: str, prefix: str) -> str:
    layer = view.layers[position]
    side = layer.side.replace("_", " ")
    title = f"<h3>{escape(short_name(layer.name))} <small>{escape(side)}</small></h3>"
    if kind == "channels":
        return title + plots.channels(layer, view.transform, prefix)
    if set(layer.ranges_before) == {ONCE}:
        return ""
    return title + plots.ranges(layer, view.transform, prefix)


def _episodes(data: ReportData) -> str:
    sections = []
    for index, episode in enumerate(data.episodes):
        title = f"{data.group_name(episode.family, episode.variant)}: {episode.task}"
        body = plots.action_traces(data, episode, f"trace{index}")
        if traces.has_frames(episode):
            body = _rollout(data, episode) + body
        sections.append((f"{title}, seed {episode.seed}", body))
    return _folds(sections, "A paired episode")


def _rollout(data: ReportData, episode: PairedEpisode) -> str:
    colours = arm_colours(data.arm_labels())
    captions = "".join(
        f'<span><i class="dot" style="background: var(--{colours[arm]})"></i>{escape(arm)}: '
        f"{'success' if trace.success else 'failure'} after {len(trace.actions)} steps</span>"
        for arm, trace in episode.traces.items()
    )
    still, moving = traces.strip(episode), traces.animation(episode)
    label = escape(f"{episode.task} played by {' and '.join(episode.traces)}")
    return (
        f'<figure class="rollout" style="--arms: {len(episode.traces)}">'
        f'<div class="captions">{captions}</div>'
        f'<picture><source media="(prefers-reduced-motion: reduce)" srcset="{still}">'
        f'<img src="{moving}" alt="{label}"></picture>'
        f"<figcaption>Same initial state, same noise. A frame turns green (success) or red "
        f"(failure) when the episode is over.</figcaption>"
        f'<img class="strip" src="{still}" alt="moments of the same episode, one row per arm">'
        f"</figure>"
    )
