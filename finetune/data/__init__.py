"""From rows to micro-batches: `source`, `encode`, `pack`, `batches`, each unaware of the others."""
