"""Everything that touches megatron.core: process groups, models, optimizer, schedules, checkpoints."""

from megatron_sftrl.engine.device import before_megatron

before_megatron()
