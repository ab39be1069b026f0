"""`sftrl preflight`: what can be wrong with nodes, network, disks and a configuration, found in seconds.

`node` looks at one machine and its disks, `network` at what lies between machines, `run`
compares what all of them found and is the order of it all.
"""
