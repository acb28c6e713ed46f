"""Everything that has weights: functions of (input, state), with no clocks and no sockets."""
