"""The DyDiLA attention core."""
