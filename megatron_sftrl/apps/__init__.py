"""Commands that stand on the core: plan, preflight, doctor, convert. Nothing in the core imports them."""
