"""head_modules: the linears that turn a model's last hidden states into its results."""

from torch import nn

# By convention, where nothing tells more: of Hugging Face's, torchvision's, timm's and many others' models.
NAMES = {"lm_head", "embed_out", "output_projection", "head", "heads", "classifier", "score", "qa_outputs"}


def head_modules(model: nn.Module) -> set[nn.Module]:
    """Those of a model and of the models in it.

    PEFT's "all-linear" leaves out the output embedding of a language model, and the head of a classifier; they are
    often tied, or new and then trained whole. In Hugging Face's models all that stands beside the base model is head.
    """
    heads = {module for name, module in model.named_modules() if NAMES & set(name.split("."))}
    for module in model.modules():
        if hasattr(module, "base_model_prefix"):
            heads |= _beside_the_base(module)
        if callable(getattr(module, "get_output_embeddings", None)):
            heads.add(module.get_output_embeddings())
    return heads


def output_heads(model: nn.Module, task_type: str | None) -> set[nn.Module]:
    """What PEFT's "all-linear" leaves out: the output embedding of one of Hugging Face's models, or where it has none
    and is to classify sequences, its classifier."""
    if not callable(getattr(model, "get_output_embeddings", None)):
        return set()
    output = model.get_output_embeddings()
    if output is None and task_type == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in ("score", "classifier"))
        output = next((head for head in heads if head is not None), None)
    return {output} - {None}


def _beside_the_base(model: nn.Module) -> set[nn.Module]:
    base = getattr(model, model.base_model_prefix, None)
    if not isinstance(base, nn.Module):
        return set()
    return set(model.modules()) - set(base.modules())
