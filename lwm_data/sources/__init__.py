"""Sources: what lies in files, record by record, as examples. One module per `type:` of the manifest."""
