"""The public names: what `tokenbridge` offers, and where it lives."""

from .audit.audit import audit_claims as audit_claims
from .audit.audit import audit_samples as audit_samples
from .audit.audit import run_audit as run_audit
from .audit.report import write_report as write_report
from .data.sources import load_images as load_images
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.metrics import score as score
from .evaluation.reconstruct import reconstruct as reconstruct
from .evaluation.reference import make_reference as make_reference
from .models.noise import image_noise as image_noise
from .models.tokenbridge.model import TokenBridge as TokenBridge
from .models.tokenbridge.sampling import TokenBridgeSampling as TokenBridgeSampling
from .models.tokenbridge.sampling import generate_tokens as generate_tokens
from .regression.gate import run_gate as run_gate
from .reproduction.discrepancies.run import measure_discrepancies as measure_discrepancies
from .reproduction.small_scale import reproduce_scale as reproduce_scale
from .reproduction.targets import reproduce as reproduce
from .results.ledger import read_ledger as read_ledger
from .sampling.convert import convert as convert
from .sampling.pipeline import TokenBridgePipeline as TokenBridgePipeline
from .sampling.sample import sample as sample
from .tokenizers.base import LatentTokenizer as LatentTokenizer
from .tokenizers.base import VQTokenizer as VQTokenizer
from .tokenizers.distortion import measure_distortion as measure_distortion
from .tokenizers.quantizer import gaussian_quantizer as gaussian_quantizer
from .tokenizers.quantizer import lloyd_max_quantizer as lloyd_max_quantizer
from .tokenizers.quantizer import uniform_quantizer as uniform_quantizer
from .training.train import train_recipe as train_recipe

__version__: str
__all__: list[str]
