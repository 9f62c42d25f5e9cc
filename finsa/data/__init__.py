"""From files to tokens.

1. `discovery` finds the files and the split of each, `readers` (with `encodings` and `delimited`) reads them.
2. `schema` brings their columns into one schema; instruction rows and chats become texts by `conversations`.
3. `sources` collects the rows of all files, of the hub or of the generator; `articles` joins articles and sentiments.
4. `dataset` gives every row a fate in the `ledger`, or a class and a split, by the policies of `labels` and `cleaning`
   and the rules of `splits`; `cache` keeps the result.
5. `prompts` renders prefix and suffix of a text, `rows` turns texts into tokens and loss masks, `tokenized` applies
   both to a data set, `sampling` chooses the training rows.

`documents` reads or generates pre-training documents. `augment`, `synthesize`, `endpoint` and `dataset_writer` write
new data sets, and `near_duplicates` finds similar texts in different splits.
"""
