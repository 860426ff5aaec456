"""First messages of ordinary visitors, and the rubric by which a reader judges the answers of the demo model."""
