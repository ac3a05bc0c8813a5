"""Imports transformers and makes one BERT-base call: what a command-line tool does."""

import torch
from transformers import BertConfig, BertModel

torch.manual_seed(0)
model = BertModel(BertConfig()).eval()
with torch.no_grad():
    out = model(torch.arange(128)[None], attention_mask=torch.ones(1, 128, dtype=torch.int64))
print(tuple(out.last_hidden_state.shape))
