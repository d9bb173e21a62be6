"""Datasets of long documents, and the batches made from them. This package does not depend on the model.

Import from its modules: `index`, `lanes` and `reader` need nothing but numpy, so that
`infini-train prep` starts quickly.
"""
