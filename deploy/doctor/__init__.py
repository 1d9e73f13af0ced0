"""``baton doctor``: facts are gathered at the edge, judged purely, and each finding brings what mends it."""
