"""`sftrl coupling`: what each stage of training did to the loss of SFT and to the reward of RL."""
