"""What all experiments share: results on disk, progress, tables, figures, errors, methods."""
