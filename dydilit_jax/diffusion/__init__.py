"""What the network is trained for and how it is sampled."""
