"""A tour: train on drawn scenes for a minute, then look, measure, search and export. Run it whole
(`python examples/tour.py`), or cell by cell in an editor that knows `# %%`. Pictures and models are written to tour/."""

# %% Train. Drawn scenes need no download. For your own images give data="photos/" in place of "demo".
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import dino
from dino.data.scenes import Scenes
from dino.features.extract import extract

out = Path("tour")
no_workers: Any = {"data.num_workers": 0}  # with workers a script wants all of this under `if __name__ == "__main__":`
run = dino.train("demo", out=str(out / "run"), overwrite=True, epochs=2, **no_workers)
model = dino.load(str(run))

# %% Attention: where each head of the last block looks. Training has not seen these scenes.
scenes = Scenes(200, first=10_000)
looks = [dino.attention_maps(model, scenes.at(96).read(i)) for i in range(3)]
for i, look in enumerate(looks):
    look.figure().save(out / f"attention-{i}.png")
print("attention [heads + 1, rows, columns]:", looks[0].attention.shape)

# %% PCA: the features of patches as colors, one basis for all three.
for i, shown in enumerate(dino.pca_colors(model, [scenes.at(96).read(i) for i in range(3)])):
    shown.figure().save(out / f"pca-{i}.png")

# %% k-NN: does a scene have the class of its neighbors? There are ten classes, so chance is 10 %.
figures = dino.evaluate("knn", model, data="scenes:1000", k=(20,)).figures
print("k-NN:", figures)

# %% Features of all scenes, and the nearest other scene of each by cosine.
features = extract(model, scenes, model.image_size).values.numpy()
features /= np.linalg.norm(features, axis=1, keepdims=True)
cosine = features @ features.T
np.fill_diagonal(cosine, -1)
nearest = cosine.argmax(axis=1)
print(f"the nearest scene is of the same class for {np.mean(scenes.labels[nearest] == scenes.labels):.0%}")
pairs = [np.hstack([scenes.read(i), scenes.read(nearest[i])]) for i in range(5)]
Image.fromarray(np.vstack(pairs)).save(out / "neighbors.png")

# %% Export: the file is opened again and compared with the model. Other formats: hf, timm, onnx, torch-export, ...
for difference in dino.export(str(run), "safetensors", str(out / "tour.safetensors")):
    print("exported, largest difference", difference)
