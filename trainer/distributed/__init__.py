"""Process groups, launchers, preemption and the watchdog that names a rank on which the others wait."""
