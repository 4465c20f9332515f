"""Every mistake has one class, a stable code, and a last sentence that says what to do.

SparsecError
 ├── OptionError                    S1xx  what the user asked torch.compile or a command for
 │    ├── UnknownOption             S101
 │    ├── BadOptionValue            S102
 │    ├── UnknownTarget             S103
 │    ├── UnknownFormat             S104
 │    └── ModeAndOptions            S105
 ├── RecipeError                    S2xx  what the user asked sparsify for
 │    ├── UnknownMethod             S201
 │    ├── UnknownRecipeKey          S202
 │    ├── UnmatchedTarget           S203
 │    ├── BadPattern                S204
 │    ├── BadRecipe                 S205
 │    ├── UnprunableLayer           S206
 │    ├── UnreadableCalibration     S209
 │    ├── NoTokenizer               S210
 │    ├── TextTooShort              S211
 │    ├── UntranslatedRecipe        S212
 │    ├── UnfitModel                S214
 │    ├── UnfitCalibration          S215
 │    ├── ModelWouldGrow            S216
 │    ├── NonFinite                 S217
 │    ├── NoLoss                    S218
 │    └── BadOutliers               S219
 ├── SpillFailed                    S207  activations that do not fit on disk
 ├── SingularHessian                S213  inputs whose X X^T cannot be inverted
 ├── PackError                      S3xx  a weight that does not hold what a format promises
 │    ├── PatternMismatch           S301
 │    ├── RoundTripMismatch         S302
 │    ├── PackedLayer               S303
 │    └── BadPack                   S304
 ├── BuildError                     S4xx  making machine code
 │    ├── NoCompiler                S401
 │    ├── CompileFailed             S402
 │    ├── KernelCompileFailed       S403
 │    ├── NoTriton                  S404
 │    ├── NoNvrtc                   S405
 │    └── NoDriver                  S406
 ├── VerifyError                    S501  a kernel disagreed with its reference
 └── InputError                     S6xx  files and models given to commands
      ├── ModelNotFound             S601
      ├── BadModelFile              S602
      ├── OutputExists              S603
      ├── MissingPackage            S604
      ├── WriteFailed               S605
      ├── OffloadedModel            S606
      ├── OtherRun                  S607
      ├── JournalFailed             S608
      ├── Unsavable                 S609
      ├── BadPackedFile             S610
      ├── TuningNotKept             S620
      ├── OtherMachine              S621
      └── BadTuningFile             S622
SparsecWarning                            a fallback happened; the answer is still right

Inside the compiler only OptionError reaches the user: everything else becomes a recorded fallback to dense.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparsecWarning(UserWarning):
    """A fallback: the result is right, but something was not accelerated, cached or read."""


class SparsecError(Exception):
    """Base. ``message`` is a template filled with the keyword arguments, which stay readable as attributes."""

    code = "S000"
    message = "{detail}"

    def __init__(self, **fields: object) -> None:
        self.fields = fields
        said = self.message.format(**fields).replace("'?.", "'?")  # a field may end with ``did_you_mean``
        super().__init__(f"{said} [{self.code}]")

    def __reduce__(self) -> tuple[object, ...]:  # exceptions with keyword arguments do not pickle by themselves
        return (_rebuild, (type(self), self.fields))


def _rebuild(cls: type[SparsecError], fields: dict[str, object]) -> SparsecError:
    return cls(**fields)


class OptionError(SparsecError, ValueError):
    code = "S100"


class UnknownOption(OptionError):
    code = "S101"
    message = "unknown option {key!r}{nearest}. Valid options are: {known}."


class BadOptionValue(OptionError):
    code = "S102"
    message = "option {key!r} is {value!r}, but {expected}."


class UnknownTarget(OptionError):
    code = "S103"
    message = "unknown target {name!r}{nearest}. Known targets are: {known}."


class UnknownFormat(OptionError):
    code = "S104"
    message = "unknown format {name!r}{nearest}. Known formats are: {known}."


class ModeAndOptions(OptionError):
    code = "S105"
    message = (
        "mode={mode!r} and options were both given. Drop mode and pass its settings as "
        'options={{"inductor": torch._inductor.list_mode_options({mode!r})}}.'
    )


class RecipeError(SparsecError, ValueError):
    code = "S200"


class UnknownMethod(RecipeError):
    code = "S201"
    message = "unknown method {name!r}{nearest}. Known methods are: {known}."


class UnknownRecipeKey(RecipeError):
    code = "S202"
    message = "the recipe has an unknown key {key!r}{nearest}. Valid keys for {where} are: {known}."


class UnmatchedTarget(RecipeError):
    code = "S203"
    message = "the {where} entry {entry!r} matches no layer of this model. The nearest layers are: {nearest}."


class BadPattern(RecipeError):
    code = "S204"
    message = "pattern {pattern!r} {why}. Write unstructured, N:M (keep N of M), V:N:M or block:RxC."


class BadRecipe(RecipeError):
    code = "S205"
    message = "the recipe is not valid: {detail}."


class UnprunableLayer(RecipeError):
    code = "S206"
    message = "{name!r} cannot be pruned: {why}. {help}"


class SpillFailed(SparsecError):
    code = "S207"
    message = (
        "activations could not be written to {folder}: {detail}. Free disk space, set TMPDIR to another folder, or "
        "allow more memory."
    )


class UnreadableCalibration(RecipeError):
    code = "S209"
    message = "calibration: {source} cannot be read: {why}."


class NoTokenizer(RecipeError):
    code = "S210"
    message = (
        "{source} is text, and {model} has no tokenizer to read it with. Give a tokenizer, or token ids: an iterable "
        "of tensors [batch, tokens] or of keyword dicts."
    )


class TextTooShort(RecipeError):
    code = "S211"
    message = (
        "the calibration text is too short: {what} {tokens} tokens, and one segment takes {seqlen}. Give more text, or "
        "set calibration.seqlen to at most {tokens}."
    )


class UntranslatedRecipe(RecipeError):
    code = "S212"
    message = "the llm-compressor recipe cannot be followed: {name} {why}."


class SingularHessian(SparsecError):
    code = "S213"
    message = "the Hessian of a layer's inputs cannot be inverted, because {why}: {help}."


class UnfitModel(RecipeError):
    code = "S214"
    message = "{method} does not fit this model ({model}): {why}. {help}"


class UnfitCalibration(RecipeError):
    code = "S215"
    message = "the calibration data cannot be used: {detail}. Give batches on which the model's outputs are finite."


class ModelWouldGrow(RecipeError):
    code = "S216"
    message = (
        "{method} at sparsity {sparsity} would make the model larger: {before} parameters would become {after}, "
        "since {why}. {help}"
    )


class NonFinite(RecipeError):
    code = "S217"
    message = (
        "{what} of {name} became NaN or infinite{where} on the calibration data. Check that the dense model gives "
        "finite outputs on it; a float16 model that overflows runs in bfloat16 or float32."
    )


class NoLoss(RecipeError):
    code = "S218"
    message = (
        "gradients need a loss, and {why}. Put labels into the data, or take a method without gradients: {methods}."
    )


class BadOutliers(RecipeError):
    code = "S219"
    message = (
        "outliers {value!r} {why}. Write a share of the weights such as 0.005, or k:256 to keep k of each 256 aside."
    )


class PackError(SparsecError):
    code = "S300"


class PatternMismatch(PackError):
    code = "S301"
    message = "the weight is not {format}: {detail}. It stays dense."


class RoundTripMismatch(PackError):
    code = "S302"
    message = "unpacking {format} did not give the weight back ({detail}). It stays dense; please report this."


class PackedLayer(PackError):
    """Something that a layer without a dense weight cannot do."""

    code = "S303"
    message = "{doing}. {help}, or call sparsec.unpack_(model) first to get dense weights back."


class BadPack(PackError):
    code = "S304"
    message = "the pack of a layer cannot be used: {why}. Pack the dense model again with sparsec.pack_(model)."


class BuildError(SparsecError):
    code = "S400"


class NoCompiler(BuildError):
    code = "S401"
    message = "no C++ compiler was found (looked for {tried}). Install g++ or clang++, or set CXX to its path."


class CompileFailed(BuildError):
    code = "S402"
    message = "{compiler} could not compile {source}: {detail}. The source was kept; please report it."


class KernelCompileFailed(BuildError):
    code = "S403"
    message = "{name} could not be compiled for {target}: {detail}. The layer stays dense; please report it."


class NoTriton(BuildError):
    code = "S404"
    message = "GPU kernels need {needs}, and {found}. Install it with: pip install triton"


class NoNvrtc(BuildError):
    code = "S405"
    message = "CUDA kernels need NVRTC, and {why}. Install it with: pip install nvidia-cuda-nvrtc"


class NoDriver(BuildError):
    code = "S406"
    message = "CUDA kernels run on an NVIDIA driver, and {why}. The layer stays dense; check nvidia-smi."


class VerifyError(SparsecError):
    code = "S501"
    message = "{where}: the {format} kernel differs from the reference by {error:.3g} (allowed {allowed:.3g})."


class InputError(SparsecError, ValueError):
    code = "S600"


class ModelNotFound(InputError):
    code = "S601"
    message = (
        "no model at {path!r}: {why}. Give a local Hugging Face folder, file.py:factory, or for a first try minilm or "
        "tiny:llama."
    )


class BadModelFile(InputError):
    code = "S602"
    message = "{path!r} cannot be used as a model: {why}."


class OutputExists(InputError):
    code = "S603"
    message = "{path!r} already holds {what}. Choose another folder, or pass --overwrite."


class MissingPackage(InputError):
    code = "S604"
    message = "{feature} needs the package {package}. Run: {run}."

    def __init__(self, **fields: object) -> None:
        """``extra`` names one of sparsec's extras; ``run`` gives the whole command where there is none."""
        super().__init__(**{"run": f"pip install 'sparsec[{fields.get('extra')}]'", **fields})


class WriteFailed(InputError):
    code = "S605"
    message = "{path!r} could not be written: {why}. Nothing was left behind; choose a place with space and try again."


class OffloadedModel(InputError):
    code = "S606"
    message = (
        "{name} is offloaded by accelerate: its weights come and go with every call, so a packed copy would be made "
        "each time. Load the model without offloading."
    )


class OtherRun(InputError):
    code = "S607"
    message = (
        "{folder!r} holds the unfinished run of another {differs}. Choose another folder, or remove {state} to start "
        "over."
    )


class JournalFailed(InputError):
    code = "S608"
    message = (
        "the state of the run could not be written to {folder}: {why}. What was finished before {name} is kept there: "
        "make room and run the same command again."
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of ``known``, or an empty string. A full stop after it is dropped."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


class Unsavable(InputError):
    code = "S609"
    message = "no checkpoint was written, since from_pretrained could not load it: {why}."


class BadPackedFile(InputError):
    code = "S610"
    message = "{path!r} cannot be loaded as a packed model: {why}. {help}"

    def __init__(self, **fields: object) -> None:
        again = "Save it again from the packed model, or pack the dense model again."
        super().__init__(**{"help": again, **fields})


class TuningNotKept(InputError):
    code = "S620"
    message = (
        "measurements could not be kept in {path}: {why}. What was measured before is safe there: make room, or choose "
        "another --cache-dir, and run the same command again."
    )


class OtherMachine(InputError):
    code = "S621"
    message = "{path!r} was measured on {theirs}, and this machine is {ours}. Run sparsec tune here instead."


class BadTuningFile(InputError):
    code = "S622"
    message = "{path!r} holds no measurements of sparsec tune --export: {why}. Export them again."
