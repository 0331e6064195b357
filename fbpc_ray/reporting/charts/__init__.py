"""Charts: reliability diagrams, histograms, comparisons of coresets, points, metrics over the steps."""
