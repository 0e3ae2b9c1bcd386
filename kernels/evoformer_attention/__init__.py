"""The Evoformer's attention, whose logits have a bias of a row's keys and one of all rows."""
