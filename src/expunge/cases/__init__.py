"""Cases: requests, splits, data and model loading."""

from expunge.cases import requests
from expunge.cases.case import Case
from expunge.cases.data import Data, MapData, Split, TensorData, as_data

__all__ = ["Case", "Data", "MapData", "Split", "TensorData", "as_data", "requests"]
