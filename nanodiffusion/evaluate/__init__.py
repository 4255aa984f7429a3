"""How good generated images are: FID and its kin, from images to numbers that say how they were made.

images: where they come from. resize, inception, features: what they become. distances, manifold: two clouds of features.
scores: measures with intervals. statistics: what is kept of a reference.
"""

from nanodiffusion.evaluate.distances import Moments, frechet, from_covariance, kernel, kernel_subsets, moments
from nanodiffusion.evaluate.features import Features, file_features, inception_features
from nanodiffusion.evaluate.images import Images, of_data, open_images
from nanodiffusion.evaluate.inception import Inception
from nanodiffusion.evaluate.resize import RESIZES
from nanodiffusion.evaluate.scores import METRICS, Score, Sides, scores
from nanodiffusion.evaluate.statistics import Statistics, summarise

__all__ = [
    "METRICS",
    "RESIZES",
    "Features",
    "Images",
    "Inception",
    "Moments",
    "Score",
    "Sides",
    "Statistics",
    "file_features",
    "frechet",
    "from_covariance",
    "inception_features",
    "kernel",
    "kernel_subsets",
    "moments",
    "of_data",
    "open_images",
    "scores",
    "summarise",
]
