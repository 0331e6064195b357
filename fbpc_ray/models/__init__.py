"""Networks and their functional form, compiled passes. Imports core, inference and data."""
