"""How `make notebooks` stores what it has executed: cell tags stay, widget state and times go."""

c = get_config()  # noqa: F821

c.ExecutePreprocessor.timeout = 600  # s a cell
c.ExecutePreprocessor.record_timing = False
c.ExecutePreprocessor.store_widget_state = False
c.ClearMetadataPreprocessor.enabled = True
c.ClearMetadataPreprocessor.clear_cell_metadata = False
c.ClearMetadataPreprocessor.preserve_nb_metadata_mask = {"kernelspec", ("language_info", "name")}
