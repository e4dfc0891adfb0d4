"""A tour: train on drawn scenes for a minute, then look, judge, compare and export. Run it whole (`python examples/tour.py`)
or cell by cell in an editor that knows `# %%`. Pictures and models go to tour/."""

# %% Train. Drawn scenes need no download; for yours give data="photos/".
from pathlib import Path

import numpy as np
from PIL import Image

import dino
from dino.data.scenes import Scenes
from dino.features.extract import extract

out = Path("tour")
run = dino.train("demo", out=str(out / "run"), overwrite=True, epochs=2)
model = dino.load(str(run))

# %% Attention: where each head of the last block looks, on scenes that training has not seen.
scenes = Scenes(200, first=10_000)
looks = [dino.attention_maps(model, scenes.at(96).read(i)) for i in range(3)]
for i, look in enumerate(looks):
    look.figure().save(out / f"attention-{i}.png")
print("attention [heads + 1, rows, columns]:", looks[0].attention.shape)

# %% PCA: the features of patches as colors, one basis for all three.
for i, shown in enumerate(dino.pca_colors(model, [scenes.at(96).read(i) for i in range(3)])):
    shown.figure().save(out / f"pca-{i}.png")

# %% k-NN: is the class of a scene that of its neighbors? Ten classes, so chance is 10 %.
figures = dino.evaluate("knn", model, data="scenes:1000", k=(20,)).figures
print("k-NN:", figures)

# %% Embed, and find each scene's nearest other one by cosine.
features = extract(model, scenes, model.image_size).values.numpy()
features /= np.linalg.norm(features, axis=1, keepdims=True)
cosine = features @ features.T
np.fill_diagonal(cosine, -1)
nearest = cosine.argmax(axis=1)
print(f"the nearest scene is of the same class for {np.mean(scenes.labels[nearest] == scenes.labels):.0%}")
pairs = [np.hstack([scenes.read(i), scenes.read(nearest[i])]) for i in range(5)]
Image.fromarray(np.vstack(pairs)).save(out / "neighbors.png")

# %% Export: what is written is opened again and compared with the model. Others: hf, timm, onnx, torch-export.
for difference in dino.export(str(run), "safetensors", str(out / "tour.safetensors")):
    print("exported, largest difference", difference)
