"""A bare GPU machine, as design.md promises: attention, packing, models and contrastive objectives need torch alone."""

import subprocess
import sys

CODE = """
import sys
for name in ("cv2", "PIL", "pyarrow", "ray", "prefect", "webdataset", "w3lib", "transformers", "open_clip", "pydantic"):
    sys.modules[name] = None
import math, torch
import training.models.blip, training.models.locked, training.models.siglip
from training.models.clip import PackedClip
from training.objectives import OBJECTIVES, Share
from training.packing import pack_images, pack_texts
model = PackedClip(16, 32, 8, (2, 32, 2), (2, 32, 2), 12, 100)
grids = [(4, 4), (2, 3)]
patches = [torch.randint(0, 256, (h * w, 192), dtype=torch.uint8) for h, w in grids]
texts = [torch.randint(0, 100, (n,)) for n in (12, 3)]
found = model(pack_images(patches, grids), pack_texts(texts))
share = Share(torch.ones(2, dtype=torch.bool), torch.tensor([[0, 0], [1, 1]]), (2,), 0)
total, count = OBJECTIVES["clip"](*found, share)
total.backward()
assert math.isfinite(float(total)) and int(count) == 2 and model.visual.conv1.weight.grad.abs().sum() > 0
print("bare")
"""


def test_a_packed_clip_learns_with_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "bare", done.stderr
