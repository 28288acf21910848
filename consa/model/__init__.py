"""Models: inspect their attention, attach an allocation, load, convert and generate."""
