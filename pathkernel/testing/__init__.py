"""Contract checks for update rules and stores, those of the package and your own; and Ctrl-C at any moment."""

from pathkernel.testing.interruption import interrupted
from pathkernel.testing.stores import StoreContractError, check_store
from pathkernel.testing.update_rules import UpdateRuleError, check_update_rule

__all__ = ["StoreContractError", "UpdateRuleError", "check_store", "check_update_rule", "interrupted"]
