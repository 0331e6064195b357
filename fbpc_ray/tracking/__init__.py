"""MLflow: runs, models, addresses. Imports core to execution."""
