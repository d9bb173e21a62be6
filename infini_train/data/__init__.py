"""Datasets of long documents and the batches made of them. Knows nothing of the model.

Import from its modules: `index`, `lanes` and `reader` need numpy alone, which `data_prep` starts quickly with.
"""
