"""The tables and figures of the paper. Imports core to tuning."""
