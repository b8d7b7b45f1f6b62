from hvdlm.diagnostics.flight_recorder import skip_in_call_sites

skip_in_call_sites("hvdlm_auto.")
