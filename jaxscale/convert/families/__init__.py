"""The families that are known, by the `model_type` of a config.json."""

from jaxscale.convert.families.bert import BERT
from jaxscale.convert.families.gemma2 import GEMMA2
from jaxscale.convert.families.gpt2 import GPT2
from jaxscale.convert.families.llama import LLAMA
from jaxscale.convert.families.mistral import MISTRAL
from jaxscale.convert.families.mixtral import MIXTRAL
from jaxscale.convert.families.olmo import OLMO2, OLMOE
from jaxscale.convert.families.opt import OPT
from jaxscale.convert.families.phi import PHI
from jaxscale.convert.families.phi3 import PHI3
from jaxscale.convert.families.phi3small import PHI3_SMALL
from jaxscale.convert.families.phimoe import PHIMOE
from jaxscale.convert.families.qwen2 import QWEN2
from jaxscale.convert.families.qwen2_moe import QWEN2_MOE
from jaxscale.convert.families.qwen3 import QWEN3, QWEN3_MOE
from jaxscale.convert.family import Family

# In the order in which an export looks for one that has all that a model has.
FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    GEMMA2,
    OLMO2,
    OLMOE,
    PHI3,
    PHI3_SMALL,
    PHIMOE,
    PHI,
    GPT2,
    OPT,
    BERT,
)
BY_MODEL_TYPE = {name: family for family in FAMILIES for name in family.model_types}
