"""Running a policy: nothing here needs a simulator or calibration code."""
