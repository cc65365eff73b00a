"""sFID: the Frechet distance in features that keep their place in the image (Nash et al. 2021, 2103.03841, sec. 5).

The features are the first 7 channels of one convolution of Inception at its 17 x 17 positions, 2,023 numbers, as ADM's
evaluator reads them (``mixed_6/conv``): see :class:`stepdistill.features.inception_network.Activations`. It tells apart
images whose parts are in the wrong places, which FID's averages over positions do not see.
"""

from __future__ import annotations

from torch import Tensor

from stepdistill.metrics.frechet import Moments, frechet_distance_of_features

DIMENSION = 2023


def sfid(spatial: Tensor, reference: Moments) -> float:
    """sFID of spatial features [N, 2023] against the moments of the reference's (``mu_s``, ``sigma_s`` of ADM's npz).

    Raises:
        ValueError: the features are not spatial features of this network.
    """
    if spatial.ndim != 2 or spatial.shape[1] != len(reference.total):
        raise ValueError(
            f"sFID compares features of one shape: there are {list(spatial.shape)} and {len(reference.total)} of the "
            "reference"
        )
    return frechet_distance_of_features(spatial, reference)
