"""The parts of `release`: its settings, what is remembered of finished stages, the stages, the plan."""
