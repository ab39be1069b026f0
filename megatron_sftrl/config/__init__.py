"""What a run is told: the schema, the reading of it, and the checks that span sections."""
