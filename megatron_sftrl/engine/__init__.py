"""Everything that touches megatron.core: process groups, models, optimizer, schedules, checkpoints."""
