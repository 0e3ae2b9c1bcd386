"""What a model writes while it is trained: an evaluator whose figures are texts."""

import dataclasses

from jaxscale.data.tokenizer import TokenizerConfig, check_vocabulary, load_tokenizer
from jaxscale.models.evaluation import EvaluationContext
from jaxscale.serve.decoding import check_prompts
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import check_positive, check_types


@dataclasses.dataclass(frozen=True)
class Samples:
    """Evaluator that continues prompts, as `jaxscale generate` would from a checkpoint of the step.

    Args:
        tokenizer: as the run's.
        prompts: the beginnings of the texts.
        max_new_tokens: longest continuation, in tokens.
        sampling: how tokens are drawn; the same draws at each evaluation.
        tensor: devices over which each copy of the model is spread while it writes.
    Cost: one copy of the parameters for every `tensor` devices while texts are written.
    """

    tokenizer: TokenizerConfig
    prompts: tuple[str, ...]
    max_new_tokens: int = 50
    sampling: SamplingConfig = SamplingConfig()
    tensor: int = 1

    def __post_init__(self):
        check_types(self)
        check_positive("Samples.max_new_tokens", self.max_new_tokens)
        check_positive("Samples.tensor", self.tensor)

    def check(self, context: EvaluationContext) -> None:
        """Encodes the prompts for the first time.

        Raises:
            InputError: a prompt is empty or too long, the tokenizer knows more tokens than the
                model, or the devices cannot hold the model.
        """
        check_vocabulary(load_tokenizer(self.tokenizer), context.model.vocab_size)
        check_prompts(self._encoded(), context.model, self.max_new_tokens)
        context.engine("Samples.tensor", self.tensor).check_room("Samples")

    def __call__(self, context: EvaluationContext) -> dict[str, str]:
        """Each prompt with its continuation, by its number."""
        tokenizer = load_tokenizer(self.tokenizer)
        engine = context.engine("Samples.tensor", self.tensor)
        continued = engine.write(
            engine.spread(context.params),
            self._encoded(),
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens,
            eos_id=tokenizer.eos_id,
            num_tokens=tokenizer.vocab_size,
        )
        texts = zip(self.prompts, continued, strict=True)
        return {
            str(number): prompt + tokenizer.decode(tokens)
            for number, (prompt, tokens) in enumerate(texts)
        }

    def _encoded(self) -> list[list[int]]:
        tokenizer = load_tokenizer(self.tokenizer)
        return [tokenizer.encode(prompt) for prompt in self.prompts]
