"""One architecture's part of a step, for each method."""
