"""A step of a scikit-learn pipeline that turns images into features."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from dino import weights
from dino.data.image_files import Images
from dino.features.extract import Pooling, extract
from dino.models import Backbone

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise ValueError("DinoFeatures needs scikit-learn; install it with: pip install 'dino-vision[search]'") from error


class DinoFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Images to features: ``make_pipeline(DinoFeatures("runs/a"), LogisticRegression()).fit(paths, labels)``.

    Images are paths, or arrays [h, w, 3] uint8 of any sizes, also as one array [n, h, w, 3]. Nothing is learned from them.

    Args:
        model: what `dino.load` takes, or a model, used on its device.
        pooling: [CLS] ('cls'), patches pooled ('average', 'gem'), or another of `POOLINGS`.
        size: edge of the evaluation view, pixels. None: the model's own.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Backbone = "vits16",
        pooling: Pooling = "cls",
        size: int | None = None,
        batch_size: int | None = None,
        device: str = "auto",
    ):
        self.model, self.size, self.batch_size, self.device = model, size, batch_size, device
        self.pooling: Pooling = pooling

    def fit(self, X: Any, y: Any = None) -> DinoFeatures:
        """Load the model and find out how long its features are."""
        self.model_ = weights.take(self.model, self.device)
        self._n_features_out = self._extract(_list_images(X)[:1]).shape[1]
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Features [n, d] float32.

        Raises:
            ValueError: an image cannot be read.
        """
        check_is_fitted(self, "model_")
        return self._extract(_list_images(X))

    def _extract(self, images: Sequence[Any]) -> np.ndarray:
        size = self.size or self.model_.view_size
        found = extract(self.model_, Images(images), size, batch_size=self.batch_size, pooling=self.pooling)
        if found.bad:
            name, reason = found.bad[0]
            raise ValueError(f"{len(found.bad)} of {len(images)} images cannot be read, first {name}: {reason}.")
        return found.values.numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit, tags.no_validation = True, True
        tags.input_tags.two_d_array, tags.input_tags.string = False, True
        return tags


def _list_images(X: Any) -> list[Any]:
    """The images in `X`, one by one.

    Raises:
        ValueError: there are none.
    """
    images = [image.item() if isinstance(image, np.str_) else image for image in X]
    if not images:
        raise ValueError("there are 0 images (0 samples); give at least 1.")
    return images
