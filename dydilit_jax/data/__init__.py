"""What goes in: sources, transforms, pipeline."""
