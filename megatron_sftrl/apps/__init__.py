"""Commands that stand on the core: plan, doctor, convert and others. Nothing in the core imports them."""
