"""Sparse dictionaries of the residual stream, trained while the model trains.

Libraries that train them were looked at, and none fits inside somebody else's training: SAELens
needs transformer-lens below 4, datasets, nltk and plotly; dictionary_learning needs nnsight below
0.4, umap and wandb; eai-sparsify brings datasets, accelerate and a trainer of its own that runs a
Hugging Face model. All draw their initial weights from torch's global random stream, which training
must find as it left it. What is needed here is the page that `sae.py` is.
"""

from __future__ import annotations

from monitor.dictionary.observing import (
    Dictionaries,
    Evaluated,
    LayerDictionary,
    Learned,
    Options,
    observe_dictionaries,
)
from monitor.dictionary.sae import SparseAutoencoder, Training, train
from monitor.dictionary.twin import shuffled

__all__ = [
    "Dictionaries",
    "Evaluated",
    "LayerDictionary",
    "Learned",
    "Options",
    "SparseAutoencoder",
    "Training",
    "observe_dictionaries",
    "shuffled",
    "train",
]
