"""The models that Motorpool knows, and how their files get here."""

from __future__ import annotations

from motorpool.catalogue.fetch import Progress, pull
from motorpool.catalogue.models import (
    NULL_MODEL,
    USER_FILE,
    BertPackageSource,
    Catalogue,
    FileSource,
    HttpsSource,
    Model,
    PackageSource,
    Source,
    catalogue_dirs,
    model_path,
    models_dir,
    parse_models,
    verify,
)

__all__ = [
    "NULL_MODEL",
    "USER_FILE",
    "BertPackageSource",
    "Catalogue",
    "FileSource",
    "HttpsSource",
    "Model",
    "PackageSource",
    "Progress",
    "Source",
    "catalogue_dirs",
    "model_path",
    "models_dir",
    "parse_models",
    "pull",
    "verify",
]
