"""`sftrl preflight`: what can be wrong with nodes, network, disks and a configuration, found in seconds.

`node` and `storage` look at one machine, `network` at what lies between them, `verdict` compares what all of
them found, `run` is the order of it all.
"""
