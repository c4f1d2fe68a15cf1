"""Models of a pipeline that are no ML programs: what kind each is, what it takes and gives."""

from __future__ import annotations

from google.protobuf.unknown_fields import UnknownFieldSet

from milpress.mil import proto

# Fields of a model that hold what it is.
_KINDS = {
    300: "GLM regressor",
    301: "support vector regressor",
    302: "tree ensemble regressor",
    303: "neural network regressor",
    304: "Bayesian probit regressor",
    400: "GLM classifier",
    401: "support vector classifier",
    402: "tree ensemble classifier",
    403: "neural network classifier",
    404: "nearest neighbors classifier",
    500: "neural network",
    501: "item similarity recommender",
    555: "custom model",
    556: "linked model",
    560: "class confidence thresholding",
    600: "one-hot encoder",
    601: "imputer",
    602: "feature vectorizer",
    603: "dictionary vectorizer",
    604: "scaler",
    606: "categorical mapping",
    607: "normalizer",
    609: "array feature extractor",
    900: "identity",
    2000: "text classifier",
    2001: "word tagger",
    2002: "vision feature print",
    2003: "sound analysis preprocessing",
    2004: "gazetteer",
    2005: "word embedding",
    2006: "audio feature print",
    3000: "serialized model",
}


def kind_of(model: proto.Model) -> str:
    """Return what kind of model one is, in words; empty if it is none that milpress knows."""
    if model.WhichOneof("choice") is not None:
        return "ML program" if model.HasField("mlProgram") else "pipeline"
    if model.HasField("nonMaximumSuppression"):
        return "non-maximum suppression"
    unknown = UnknownFieldSet(model)
    numbers = [unknown[i].field_number for i in range(len(unknown))]
    return next((_KINDS[number] for number in numbers if number in _KINDS), "")
