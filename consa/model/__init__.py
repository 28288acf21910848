"""Models: look at their attention, attach an allocation, load, convert and generate."""
