"""Recipe + tensor headers -> Plan: claims, bytes, memory, time, and every early error."""
