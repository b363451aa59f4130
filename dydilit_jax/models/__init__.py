"""What the network is: DyDi-LiT and its parts."""
