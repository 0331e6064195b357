"""Charts: reliability diagrams, histograms, comparisons of coresets, metrics over the steps."""
